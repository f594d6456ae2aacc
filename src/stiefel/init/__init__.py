"""How weights start: orthogonal, of chosen rank, shrunk and perturbed, rich in features."""
