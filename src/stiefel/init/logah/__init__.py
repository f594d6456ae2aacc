"""LoGAH: graph hypernetworks with low-rank decoders. Its public names are in ``stiefel.init``."""
