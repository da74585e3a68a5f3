"""The gRPC API: `manta.v1` over `serve.service`. Only this package imports grpc."""
