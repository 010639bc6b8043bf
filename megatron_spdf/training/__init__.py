"""Training loop, the job around it, its report, and the choice of the micro-batch."""
