"""The branches that look at one region each: box, mask and keypoint (section 3, figure 4)."""
