"""Support for special layers and weights: packed attention, quantised and sharded weights, subclasses of layers."""
