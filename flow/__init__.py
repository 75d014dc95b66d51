"""Flow matching: the method (path, prior, time law, loss, guidance, solvers), its engine and its evaluation."""
