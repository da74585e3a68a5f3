"""What the world sees: settings, the service core, and its HTTP and gRPC APIs."""
