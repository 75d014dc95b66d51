"""Flow matching: paths, sources, time samplers, losses, guidance and solvers; their training, sampling and evaluation."""
