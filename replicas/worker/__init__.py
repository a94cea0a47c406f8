"""One rank's work for a step: inputs on the device, the forward pass, CUDA graphs, the exchange between stages."""
