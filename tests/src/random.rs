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
        // Below `bound`, so it fits.
        ((self.0 >> 11) % bound as u64) as usize
    }

    /// One of the values.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// True once in so many times.
    ///
    /// # Panics
    ///
    /// If `of` is zero.
    pub fn chance(&mut self, of: usize) -> bool {
        self.below(of) == 0
    }
}
