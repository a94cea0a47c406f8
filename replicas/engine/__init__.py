"""The engine of one replica: scheduling, the block pool and the life of sequences. No tensors."""
