//! Decompression with a limit. The state of the decompressor is kept, because it takes longer to make one than to decompress
//! a message.

use std::cell::RefCell;
use std::io;

use zstd::bulk::Decompressor;

thread_local! {
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decompresses a zstd frame.
///
/// # Errors
///
/// It is damaged, or its content is longer than `most` bytes.
pub(super) fn decompress(frame: &[u8], most: usize) -> io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|kept| {
        let decompressor = match kept {
            Some(decompressor) => decompressor,
            none => none.insert(Decompressor::new()?),
        };
        decompressor.decompress(frame, most)
    })
}
