"""Models: one declarative decoder, and a specification of it per family."""
