"""Preconditioners: what turns the gradient g into z = M⁻¹g."""
