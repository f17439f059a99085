"""Training loops: each reads like its algorithm and calls the rooms of `hybrid_rl` for everything else."""
