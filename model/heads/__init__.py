"""The branches that run on each region: box, mask and keypoint (section 3, figure 4)."""
