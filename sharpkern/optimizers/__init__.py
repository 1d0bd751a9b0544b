"""What an optimizer does to curvature: its preconditioner, its threshold, its next update."""
