//! Where an engine keeps a token's keys and values, and the copies between its pages and one contiguous block.
//!
//! A block's own order is always the same: layer, then keys before values, then pages in the order asked for, each page's bytes
//! as the engine has them. So a layer is one range of a block, and can be loaded while the layer before it is computed with.
//! What differs within a page (tokens before heads, or heads before tokens; the type of an element; which of the heads a
//! tensor-parallel rank has) does not move here: blocks of engines that differ in it are different blocks.

use std::ops::Range;

use super::memory::DeviceSlice;
use super::stream::{Copy, Place};

/// What a layer keeps of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvParts {
    /// Keys and values.
    KeysAndValues,
    /// One vector that both are computed from (multi-head latent attention).
    Latent,
}

impl KvParts {
    fn count(self) -> usize {
        match self {
            KvParts::KeysAndValues => 2,
            KvParts::Latent => 1,
        }
    }
}

/// What is outermost within a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvOrder {
    /// All keys, then all values: `[2, pages, …]`.
    PartsOuter,
    /// Page by page, in each the keys and then the values: `[pages, 2, …]`.
    PagesOuter,
}

/// How an engine's KV cache lies on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers whose tokens are kept.
    pub layers: u32,
    /// What each keeps.
    pub parts: KvParts,
    /// In which order.
    pub order: KvOrder,
    /// Whether all layers lie in one tensor, one after the other; else each has its own.
    pub one_tensor: bool,
    /// Pages of each layer.
    pub pages: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Heads that this device has: of all heads its tensor-parallel share. 1 for latent vectors.
    pub heads: u32,
    /// Elements of one head's vector.
    pub head_elements: u32,
    /// Bytes of an element.
    pub element_bytes: u32,
}

/// A layout that cannot be, or pages or memory that do not fit one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A count of zero, or sizes beyond what memory can have.
    #[error("no layout has {0}")]
    Impossible(&'static str),
    /// As many tensors as the layout says.
    #[error("{given} tensors, the layout has {wanted}")]
    Tensors {
        /// What was given.
        given: usize,
        /// What the layout has.
        wanted: usize,
    },
    /// A tensor of another size.
    #[error("tensor {tensor} has {given} bytes, the layout says {wanted}")]
    TensorBytes {
        /// Which, from 0.
        tensor: usize,
        /// What was given.
        given: usize,
        /// What the layout says.
        wanted: usize,
    },
    /// A page or layer that the layout does not have.
    #[error("{what} {number} of {count}")]
    Beyond {
        /// Page or layer.
        what: &'static str,
        /// Which, from 0.
        number: u32,
        /// How many there are.
        count: u32,
    },
    /// A block of another size.
    #[error("the block has {given} bytes, these pages and layers {wanted}")]
    BlockBytes {
        /// What was given.
        given: usize,
        /// What is needed.
        wanted: usize,
    },
}

/// A range that is contiguous both in a tensor and in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Chunk {
    tensor: usize,
    in_tensor: usize,
    in_block: usize,
    bytes: usize,
}

impl KvLayout {
    /// Bytes of one part of one page of one layer: what always lies together.
    fn row_bytes(&self) -> Result<usize, LayoutError> {
        product(&[self.page_tokens, self.heads, self.head_elements, self.element_bytes])
    }

    /// Bytes of a block of so many pages, all layers.
    ///
    /// # Errors
    /// Where the layout cannot be.
    pub fn block_bytes(&self, pages: usize) -> Result<usize, LayoutError> {
        let pages = u32::try_from(pages).map_err(|_| LayoutError::Impossible("so many pages"))?;
        self.bytes_of(self.layers, pages)
    }

    /// How many tensors there are, and bytes of each.
    ///
    /// # Errors
    /// Where the layout cannot be.
    pub fn tensors(&self) -> Result<(usize, usize), LayoutError> {
        let (count, layers) = if self.one_tensor {
            (1, self.layers)
        } else {
            (self.layers, 1)
        };
        let bytes = self.bytes_of(layers, self.pages)?;
        // Layers of zero are found out here, too.
        self.bytes_of(self.layers, 1)?;
        Ok((count as usize, bytes))
    }

    fn bytes_of(&self, layers: u32, pages: u32) -> Result<usize, LayoutError> {
        let parts = u32::try_from(self.parts.count()).expect("one or two");
        let rows = product(&[layers, parts, pages])?;
        rows.checked_mul(self.row_bytes()?)
            .ok_or(LayoutError::Impossible("more bytes than memory can have"))
    }

    /// Whether these can be an engine's tensors of this layout.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self, tensors: &[DeviceSlice]) -> Result<(), LayoutError> {
        let (count, bytes) = self.tensors()?;
        if tensors.len() != count {
            let (given, wanted) = (tensors.len(), count);
            return Err(LayoutError::Tensors { given, wanted });
        }
        if let Some((tensor, other)) = tensors.iter().enumerate().find(|(_, slice)| slice.len() != bytes) {
            let (given, wanted) = (other.len(), bytes);
            return Err(LayoutError::TensorBytes { tensor, given, wanted });
        }
        Ok(())
    }

    /// Whether the layout has these pages.
    ///
    /// # Errors
    /// The first that it does not have.
    pub fn check_pages(&self, pages: &[u32]) -> Result<(), LayoutError> {
        let (what, count) = ("page", self.pages);
        match pages.iter().find(|page| **page >= count) {
            Some(&number) => Err(LayoutError::Beyond { what, number, count }),
            None => Ok(()),
        }
    }

    /// Copies that bring `pages` of `layers` together in `block`, in its own order.
    ///
    /// # Errors
    /// What does not fit the layout.
    pub fn gather(
        &self,
        tensors: &[DeviceSlice],
        pages: &[u32],
        layers: Range<u32>,
        block: &Place,
    ) -> Result<Vec<Copy>, LayoutError> {
        self.copies(tensors, pages, layers, block, |page, block| Copy {
            source: page,
            target: block,
        })
    }

    /// Copies that spread a block over `pages` of `layers`.
    ///
    /// # Errors
    /// What does not fit the layout.
    pub fn scatter(
        &self,
        block: &Place,
        tensors: &[DeviceSlice],
        pages: &[u32],
        layers: Range<u32>,
    ) -> Result<Vec<Copy>, LayoutError> {
        self.copies(tensors, pages, layers, block, |page, block| Copy {
            source: block,
            target: page,
        })
    }

    fn copies(
        &self,
        tensors: &[DeviceSlice],
        pages: &[u32],
        layers: Range<u32>,
        block: &Place,
        copy: impl Fn(Place, Place) -> Copy,
    ) -> Result<Vec<Copy>, LayoutError> {
        self.check(tensors)?;
        let chunks = self.chunks(pages, layers)?;
        let wanted = chunks.last().map_or(0, |chunk| chunk.in_block + chunk.bytes);
        if block.len() != wanted {
            let given = block.len();
            return Err(LayoutError::BlockBytes { given, wanted });
        }
        let of = |chunk: &Chunk| {
            let page = tensors[chunk.tensor].subslice(chunk.in_tensor, chunk.bytes);
            let page = Place::Device(page.expect("within the tensor, as its size and the page were checked"));
            let place = block.part(chunk.in_block, chunk.bytes);
            copy(page, place.expect("within the block, as its size was checked"))
        };
        Ok(chunks.iter().map(of).collect())
    }

    /// What is copied, in the order of the block, neighbours joined.
    fn chunks(&self, pages: &[u32], layers: Range<u32>) -> Result<Vec<Chunk>, LayoutError> {
        let (_, tensor_bytes) = self.tensors()?;
        if layers.end > self.layers {
            let (what, number, count) = ("layer", layers.end - 1, self.layers);
            return Err(LayoutError::Beyond { what, number, count });
        }
        self.check_pages(pages)?;
        let (row, parts, all) = (self.row_bytes()?, self.parts.count(), self.pages as usize);
        let layer_bytes = row * parts * all;
        let mut chunks: Vec<Chunk> = Vec::new();
        let mut in_block = 0;
        for layer in layers {
            let (tensor, base) = match self.one_tensor {
                true => (0, layer as usize * layer_bytes),
                false => (layer as usize, 0),
            };
            for part in 0..parts {
                for page in pages {
                    let page = *page as usize;
                    let number = match self.order {
                        KvOrder::PartsOuter => part * all + page,
                        KvOrder::PagesOuter => page * parts + part,
                    };
                    let in_tensor = base + number * row;
                    debug_assert!(in_tensor + row <= tensor_bytes, "the page was checked");
                    match chunks.last_mut() {
                        Some(last) if last.tensor == tensor && last.in_tensor + last.bytes == in_tensor => {
                            last.bytes += row;
                        }
                        _ => chunks.push(Chunk {
                            tensor,
                            in_tensor,
                            in_block,
                            bytes: row,
                        }),
                    }
                    in_block += row;
                }
            }
        }
        Ok(chunks)
    }
}

/// None of them zero, and no more than memory can have.
fn product(counts: &[u32]) -> Result<usize, LayoutError> {
    if counts.contains(&0) {
        return Err(LayoutError::Impossible("a count of zero"));
    }
    counts
        .iter()
        .try_fold(1usize, |all, count| all.checked_mul(*count as usize))
        .filter(|all| isize::try_from(*all).is_ok())
        .ok_or(LayoutError::Impossible("more bytes than memory can have"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: KvLayout = KvLayout {
        layers: 3,
        parts: KvParts::KeysAndValues,
        order: KvOrder::PartsOuter,
        one_tensor: false,
        pages: 10,
        page_tokens: 16,
        heads: 8,
        head_elements: 128,
        element_bytes: 2,
    };
    const ROW: usize = 16 * 8 * 128 * 2;

    fn places(layout: &KvLayout, pages: &[u32]) -> Vec<(usize, usize, usize)> {
        let chunks = layout.chunks(pages, 0..layout.layers).expect("it fits");
        chunks
            .iter()
            .map(|chunk| (chunk.tensor, chunk.in_tensor / ROW, chunk.bytes / ROW))
            .collect()
    }

    #[test]
    fn sizes_are_those_of_the_engine_s_tensors() {
        assert_eq!(LAYOUT.tensors(), Ok((3, 2 * 10 * ROW)));
        assert_eq!(LAYOUT.block_bytes(4), Ok(3 * 2 * 4 * ROW));
        let one = KvLayout {
            one_tensor: true,
            ..LAYOUT
        };
        assert_eq!(one.tensors(), Ok((1, 3 * 2 * 10 * ROW)));
        let latent = KvLayout {
            parts: KvParts::Latent,
            heads: 1,
            head_elements: 576,
            ..LAYOUT
        };
        assert_eq!(latent.block_bytes(1), Ok(3 * 16 * 576 * 2));
    }

    #[test]
    fn a_page_lies_where_each_order_has_it() {
        assert_eq!(
            places(&LAYOUT, &[7]),
            [(0, 7, 1), (0, 17, 1), (1, 7, 1), (1, 17, 1), (2, 7, 1), (2, 17, 1)]
        );
        let together = KvLayout {
            order: KvOrder::PagesOuter,
            ..LAYOUT
        };
        assert_eq!(
            places(&together, &[7]),
            [(0, 14, 2), (1, 14, 2), (2, 14, 2)],
            "keys and values of a page are neighbours"
        );
        let one = KvLayout {
            one_tensor: true,
            ..LAYOUT
        };
        assert_eq!(places(&one, &[7])[2..4], [(0, 27, 1), (0, 37, 1)]);
    }

    #[test]
    fn pages_that_are_neighbours_are_one_copy() {
        assert_eq!(places(&LAYOUT, &[4, 5, 6, 2])[..2], [(0, 4, 3), (0, 2, 1)]);
        assert_eq!(places(&LAYOUT, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9])[..1], [(0, 0, 20)]);
        assert_eq!(
            places(&LAYOUT, &[9, 8])[..2],
            [(0, 9, 1), (0, 8, 1)],
            "the other way round is not"
        );
    }

    #[test]
    fn a_layer_is_one_range_of_a_block() {
        let all = LAYOUT.chunks(&[3, 1], 0..3).expect("it fits");
        let second = LAYOUT.chunks(&[3, 1], 1..2).expect("it fits");
        let layer_bytes = 2 * 2 * ROW;
        let within: Vec<Chunk> = all.into_iter().filter(|chunk| chunk.tensor == 1).collect();
        assert_eq!(within[0].in_block, layer_bytes);
        let shifted: Vec<Chunk> = second
            .into_iter()
            .map(|chunk| Chunk {
                in_block: chunk.in_block + layer_bytes,
                ..chunk
            })
            .collect();
        assert_eq!(shifted, within);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let nothing = KvLayout { heads: 0, ..LAYOUT };
        assert_eq!(nothing.tensors(), Err(LayoutError::Impossible("a count of zero")));
        let huge = KvLayout {
            pages: u32::MAX,
            page_tokens: u32::MAX,
            head_elements: u32::MAX,
            ..LAYOUT
        };
        assert!(huge.tensors().is_err() && huge.block_bytes(1).is_err());
        assert_eq!(
            LAYOUT.chunks(&[10], 0..3),
            Err(LayoutError::Beyond {
                what: "page",
                number: 10,
                count: 10
            })
        );
        assert_eq!(
            LAYOUT.chunks(&[1], 0..4),
            Err(LayoutError::Beyond {
                what: "layer",
                number: 3,
                count: 3
            })
        );
    }
}
