//! The checksum of IP, TCP and UDP (RFC 1071).

/// Adds bytes to a sum as 16-bit words in network byte order. If a checksum takes several calls, all but the
/// last must have an even number of bytes.
#[inline]
pub(crate) fn add(sum: u64, bytes: &[u8]) -> u64 {
    // Four independent sums in native byte order: swapping the result is enough (RFC 1071, section 2B).
    let (mut a, mut b, mut c, mut d) = (0, 0, 0, 0);
    let (chunks, rest) = bytes.as_chunks::<32>();
    let word = |chunk: &[u8; 32], at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&chunk[at..at + 8]);
        let word = u64::from_ne_bytes(bytes);
        (word & 0xffff_ffff) + (word >> 32)
    };
    for chunk in chunks {
        a += word(chunk, 0);
        b += word(chunk, 8);
        c += word(chunk, 16);
        d += word(chunk, 24);
    }
    let mut total: u64 = a + b + c + d;
    for pair in rest.chunks(2) {
        let second = pair.get(1).copied().unwrap_or(0);
        total += u64::from(u16::from_ne_bytes([pair[0], second]));
    }
    sum + u64::from(u16::from_be(fold(total)))
}

/// Folds a sum to 16 bits.
#[inline]
pub(crate) fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Returns the value of a checksum field for a sum.
pub(crate) fn finish(sum: u64) -> u16 {
    !fold(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word_by_word(bytes: &[u8]) -> u16 {
        fold(bytes.chunks(2).map(|p| u64::from(p[0]) << 8 | u64::from(*p.get(1).unwrap_or(&0))).sum())
    }

    #[test]
    fn the_sum_is_that_of_the_rfc() {
        // RFC 1071, section 3.
        assert_eq!(fold(add(0, &[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
    }

    #[test]
    fn every_length_gives_the_sum_of_single_words() {
        let bytes: Vec<u8> = (0..3000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for length in (0..200).chain([1399, 1400, 2999, 3000]) {
            assert_eq!(fold(add(0, &bytes[..length])), word_by_word(&bytes[..length]), "{length}");
        }
        assert_eq!(fold(add(0, &[0xff; 4096])), 0xffff);
    }
}
