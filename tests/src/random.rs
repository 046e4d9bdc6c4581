//! Random numbers that depend on a seed alone.

/// A generator of random numbers (Marsaglia, "Xorshift RNGs").
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Numbers for this seed.
    pub fn new(seed: u64) -> Self {
        // Zero would be the only number.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`.
    ///
    /// # Panics
    ///
    /// If `bound` is zero.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 11) % bound as u64).unwrap()
    }
}
