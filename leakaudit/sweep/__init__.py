"""Many audits: every protocol with every defense under every attack, resumable, on one machine or on many."""
