"""Language models as judges: the requests, sending each of them once, and the statistics of the answers."""
