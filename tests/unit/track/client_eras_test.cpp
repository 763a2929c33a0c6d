// SPDX-License-Identifier: Apache-2.0
//
// Which clients a volume may serve after it became the copy of another primary.
#include "tests/unit/track/track_fixture.h"

namespace vmferry {
namespace {

class ClientErasTest : public TrackTest {
 protected:
  void SetUp() override {
    TrackTest::SetUp();
    start_world(1);
    ASSERT_TRUE(open_device());
  }
};

TEST_F(ClientErasTest, WriterIsCutOffWhenContentComesAndALaterReaderIsNot) {
  // A running guest would see the other guest's blocks between its own.
  device->set_gate(WriteGate::Open);
  const uint64_t guest = device->next_client();
  device->set_gate(WriteGate::Parked);
  EXPECT_TRUE(device->may_serve(guest)) << "a migration may still roll back";
  device->set_gate(WriteGate::ReadOnly);
  EXPECT_TRUE(device->may_serve(guest)) << "it is still its own data";
  const uint64_t incoming = device->next_client();
  device->retire_writers();
  EXPECT_FALSE(device->may_serve(guest));
  EXPECT_TRUE(device->may_serve(incoming)) << "the QEMU of the way back is connected before the first epoch";
  device->retire_writers();
  EXPECT_TRUE(device->may_serve(incoming));
  device->set_gate(WriteGate::Open);
  EXPECT_FALSE(device->may_serve(guest)) << "what it has in memory is of another disk";
  EXPECT_TRUE(device->may_serve(incoming));
  // And the same once more, for the one that writes now.
  device->set_gate(WriteGate::ReadOnly);
  device->retire_writers();
  EXPECT_FALSE(device->may_serve(incoming));
  EXPECT_TRUE(device->may_serve(device->next_client()));
}

TEST_F(ClientErasTest, WriterNeverSeesZeroesAndIsServedAgainWhenNothingCame) {
  // A file system that reads zeroes repairs itself to death.
  device->set_gate(WriteGate::Open);
  const uint64_t guest = device->next_client();
  device->set_gate(WriteGate::ReadOnly);
  device->serve_zeroes(true);
  EXPECT_FALSE(device->may_serve(guest));
  EXPECT_TRUE(device->may_serve(device->next_client()));
  device->serve_zeroes(false);
  device->set_gate(WriteGate::Open);
  EXPECT_TRUE(device->may_serve(guest));
}

TEST_F(ClientErasTest, ReaderOfACopyIsServedThroughItsFirstEpochs) {
  // The destination of a migration opens its disks before there is anything in them.
  device->set_gate(WriteGate::ReadOnly);
  device->serve_zeroes(true);
  const uint64_t incoming = device->next_client();
  device->retire_writers();
  device->serve_zeroes(false);
  device->retire_writers();
  EXPECT_TRUE(device->may_serve(incoming));
}

}  // namespace
}  // namespace vmferry
