"""What platform admins do with principals, and what everybody does with their own keys."""
