"""Layer stacks: the protocol that the pipeline runs, and the models that ship."""
