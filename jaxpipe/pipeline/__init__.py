"""From a layer stack and a schedule to one SPMD program: split, lower, execute, check."""
