"""The paper's analyses on a model of one's own: one module a study, over shared targets."""
