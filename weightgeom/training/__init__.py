"""Training: settings, trainers of TRL, resumable states, losses and matched budgets."""
