"""The two names that Flower asks a project for."""
