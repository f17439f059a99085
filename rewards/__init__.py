"""Built-in rewards, each written exactly as a user writes one: a function over completions and columns."""
