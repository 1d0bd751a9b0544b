"""Callbacks for trainers of other libraries; each module needs its own library."""
