"""What crosses between router and replica: frames, handshake, errors, and the directory of replicas."""
