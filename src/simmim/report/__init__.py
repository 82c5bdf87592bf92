"""`simmim report`: what a run did and what it is worth, as one HTML file."""
