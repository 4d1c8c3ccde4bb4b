"""What a reader of the layer need not know: packed attention, quantised and sharded weights, subclasses of layers."""
