"""Names of modules: the neutral ones, those of the architectures' own code, and how each tool spells them."""
