"""The reference trainer: plain torch, sharpness at every step."""
