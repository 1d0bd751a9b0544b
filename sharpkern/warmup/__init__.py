"""Learning-rate warmup: schedules, the critical learning rate, and a measured suggestion."""
