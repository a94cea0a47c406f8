"""Linear methods: how a layer's weight is stored, loaded and multiplied."""
