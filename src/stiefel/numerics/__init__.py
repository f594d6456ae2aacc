"""Numerical methods in the style of NumPy, SciPy and scikit-learn."""
