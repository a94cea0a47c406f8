"""The router: global queue, placement over replicas, and replay when one is lost."""
