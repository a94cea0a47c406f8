"""The replica deployment and the TCP server that routers connect to."""
