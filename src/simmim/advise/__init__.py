"""`simmim advise`: which accelerator to rent, how long a training takes and what it costs."""
