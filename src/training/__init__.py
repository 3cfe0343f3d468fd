"""What acts on tensors? Loss, optimizer, guard, generation, scoring."""
