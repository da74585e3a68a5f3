"""The gRPC front: `manta.v1` over `serve.service`. Only this package imports grpc."""
