"""The backbone: ResNet or ResNeXt, with or without a feature pyramid (section 3, "Network Architecture")."""
