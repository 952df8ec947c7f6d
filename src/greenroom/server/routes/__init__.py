"""The routes, a file per API: each turns its request into a `Call` and pieces into its shapes."""
