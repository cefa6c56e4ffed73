"""What replica groups need to go on together: the recovery plan, and the way a state travels between them."""
