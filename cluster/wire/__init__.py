"""The wire between routers and replicas: frames, handshake and errors, and the directory of replicas."""
