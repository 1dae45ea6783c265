"""The same results from hidden states and the head's weight: logits exist a chunk at a time, in one workspace.
`stats`, `policy_loss` and `sega_loss` are public; `head`, `products` and `one_shot` are what they are made of."""
