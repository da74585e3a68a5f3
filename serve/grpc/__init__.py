"""The gRPC front: `manta.v1` over the service core. The only place that knows grpc."""
