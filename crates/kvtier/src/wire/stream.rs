use super::{DecodeError, Frame, Header};

/// Turns received bytes into frames, however they were cut. Sans I/O: [`FrameStream::space`], read into it,
/// [`FrameStream::advance`], then [`FrameStream::next`] until it has none.
///
/// It holds at most one frame and what one read brought, and shrinks back to its first size once a longer frame is gone.
#[derive(Debug)]
pub struct FrameStream {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    base: usize,
}

impl FrameStream {
    /// A stream whose reads take up to `bytes` at a time (at least a header).
    #[must_use]
    pub fn new(bytes: usize) -> FrameStream {
        let base = bytes.max(super::HEADER_BYTES);
        FrameStream {
            buffer: vec![0; base],
            start: 0,
            end: 0,
            base,
        }
    }

    /// Where the next received bytes go; never empty. Frames taken before are gone after this.
    pub fn space(&mut self) -> &mut [u8] {
        let held = self.end - self.start;
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, held);
        }
        // A header that breaks the rules is reported by `next`; here it only means that no more room is needed.
        let frame = match Header::decode(&self.buffer[..held]) {
            Ok(Some(header)) => header.frame_bytes(),
            _ => 0,
        };
        let wanted = frame.max(self.base).max(held + 1);
        if wanted > self.buffer.len() {
            self.buffer.resize(wanted, 0);
        } else if self.buffer.len() > self.base && wanted == self.base {
            self.buffer.truncate(self.base);
            self.buffer.shrink_to(self.base);
        }
        &mut self.buffer[held..]
    }

    /// `count` bytes were written to the front of [`FrameStream::space`]; a count over its length is taken as its length.
    pub fn advance(&mut self, count: usize) {
        self.end = self.end.saturating_add(count).min(self.buffer.len());
    }

    /// Bytes received and not yet taken.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.end - self.start
    }

    /// Whether [`FrameStream::next`] has something to say.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !matches!(Frame::decode(&self.buffer[self.start..self.end]), Ok(None))
    }

    /// The next whole frame; `None` when more bytes are needed.
    ///
    /// # Errors
    /// A broken header: the stream is lost, and says so each time.
    #[expect(
        clippy::should_implement_trait,
        reason = "it lends: a frame lies in the stream's own buffer"
    )]
    pub fn next(&mut self) -> Result<Option<Frame<'_>>, DecodeError> {
        let frame = Frame::decode(&self.buffer[self.start..self.end])?;
        if let Some(frame) = &frame {
            self.start += frame.header.frame_bytes();
        }
        Ok(frame)
    }
}
