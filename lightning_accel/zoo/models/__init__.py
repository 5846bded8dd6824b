"""Small reference models: ordinary LightningModules."""
