"""The step channel: sockets, their handshake and the frames that carry plans and results."""
