"""The dry run: what a training would see, what it trains, and what it would cost; and the configs of `new`."""
