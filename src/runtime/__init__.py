"""How is this process run? Flags, plan, machine, launcher, signals, doctor."""
